"""Tables, charts and pages. Reads result files only and never imports torch."""
