"""What a run has to say: schema, figures, tables and comparisons."""
