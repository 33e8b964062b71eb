"""Attacks on an installation, with a victim that is measured meanwhile."""
