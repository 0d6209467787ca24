"""deltaspec's own methods, one file each, found by their names. A method knows no other method."""
