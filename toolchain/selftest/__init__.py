"""The self-test: a few calls of every graph whose answers are known, kept in the artifact for the device to repeat."""
