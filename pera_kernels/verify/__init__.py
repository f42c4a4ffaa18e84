"""Error of every op, terms, rank, dtype and backend against float64, for the sceptic."""
