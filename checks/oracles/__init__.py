"""Independent formulas and readers: plain and slow, with their sources, importing nothing of what they judge."""
