"""What serving a teacher takes, computed before anything is rented."""
