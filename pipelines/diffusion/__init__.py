"""The denoisers of diffusers: one small declarative file per family, imported when a pipeline of it is met."""
