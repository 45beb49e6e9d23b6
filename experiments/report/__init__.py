"""The report of a study: pages, tables, figures, executed notebooks."""
