"""Which type each tensor gets, by what it does to the student's own traces."""
