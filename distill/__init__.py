"""Problems, teachers, traces, verification, student training and evaluation."""
