"""Settings: their schema, composition from `configs/`, and every check that needs no device."""
