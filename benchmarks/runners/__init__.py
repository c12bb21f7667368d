"""One runner for each library: the same federation, written the way that library wants it written."""
