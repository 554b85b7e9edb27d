"""The folder of an audit: records, maps, and whether they are what was written."""
