"""What several servers on one PostgreSQL share besides rows: changes announced at once."""
