"""What several commands use. Commands import nothing of one another."""
