"""Files that are whole or absent: atomic writes, locks, checksums, cache entries, downloads, crash points, removal."""
