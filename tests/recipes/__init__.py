"""A package, because another folder of tests has a test_bcnn.py too."""
