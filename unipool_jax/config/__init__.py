"""Settings: the schema, composition from `configs/`, and every rule that needs no device."""
