"""Papers' tables and figures run anew and judged, the demo, and pages that compare runs."""
