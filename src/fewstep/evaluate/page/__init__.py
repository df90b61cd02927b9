"""The report: one page of HTML with tables, pictures and clips, and the same figures as text."""
