"""What every program shares: options, files, processes, cards. Imports nothing from above."""
