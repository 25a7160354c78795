"""A package, because names of its files occur in other folders, too."""
