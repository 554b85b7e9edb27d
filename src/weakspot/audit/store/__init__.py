"""The folder of a run: records, maps, run.json, and whether they are what was written."""
