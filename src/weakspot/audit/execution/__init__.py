"""The work of an audit: shards of images under every attack in every region, and resumption after a crash."""
