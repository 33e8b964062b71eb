"""Fine-tuning methods as declarations: one module per method of `FineTuneJob.spec.method`.

A method's class of fields declares its traits (PEFT's type, the default learning rate, whether it can be quantized,
merged, served and sharded) and, beside each field, PEFT's name of it. A new method is a module here and a field of
`tunesmith.api.method.Method`; CEL rules, the trainer's PEFT configuration, its limits and the importer follow.
"""
