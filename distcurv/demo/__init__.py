"""What `distcurv demo` trains and shows: two small tasks on data that every machine has."""
