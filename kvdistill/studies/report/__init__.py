"""The report of a study: what was compared, how it went, and how sure one can be."""
