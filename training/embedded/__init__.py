"""Training of the embedded models, stage by stage, on the CPU (``make tiny``).

Read ``stages`` (their order and sizes), ``data`` (studies of the benchmark), ``loop`` (the training
loop), ``vision`` (the tower), ``text``, ``vlm`` and ``vqa`` (the answering model) with ``dialogue``
(questions, references and answers in the model's own strings), ``clip`` (encoders), ``preference``
(pairs and adapters), ``check`` (measures and the model card), ``fusion`` (what references could
give at most).
"""
