"""Projection: maps between a teacher's key/value space and the student's."""
