"""A trained network as another runtime computes it: the forms there are, and how each is made."""
