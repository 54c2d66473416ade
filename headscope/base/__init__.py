"""What every other room stands on: values and small functions that know no model."""
