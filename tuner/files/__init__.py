"""Files that are whole or absent.

Atomic writes, locks, checksums, cache entries, downloads, crash points, removal.
"""
