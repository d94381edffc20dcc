"""Studies: arms times seeds from one store, their controls, statistics and reports."""
