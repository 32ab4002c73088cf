"""From the user's files to memory-mapped Arrow, cleaned, split and encoded once."""
