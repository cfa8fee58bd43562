"""The long runs behind the documentation's claims: what is planned, what has run, and what it answers."""
