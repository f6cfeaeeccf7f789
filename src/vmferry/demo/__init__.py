"""Two hosts with real agents on one machine, and a real guest that is moved between them (`vmferry demo`)."""
