"""What each of several teachers reads and teaches."""
