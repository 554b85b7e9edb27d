"""The page of an audit: a whole data set in one self-contained HTML file."""
