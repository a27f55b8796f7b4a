"""How models are spread over devices; for now the plain data by which layers declare their sharding."""
