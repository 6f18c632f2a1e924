"""What several commands use. Commands import nothing from one another."""
