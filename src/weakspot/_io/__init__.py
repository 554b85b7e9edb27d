"""Files written whole or not at all, locks of folders, files by URL."""
