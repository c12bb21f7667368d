"""From YAML to checked objects. The only place that knows every table of components."""
