"""Alignment: which teacher positions and layers a student position and layer is compared with."""
