"""Pure planning: names and numbers in, frozen values out. Standard library only."""
