"""From a name, a folder or a module to a proved ``HeadModel``."""
