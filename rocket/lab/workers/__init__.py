"""Several processes of the API that share its port."""
