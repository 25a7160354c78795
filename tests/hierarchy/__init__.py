"""A package, because another folder of tests has a test_plots.py too."""
