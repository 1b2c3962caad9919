"""Training of the embedded models, stage by stage, on the CPU (``make tiny``).

Read ``stages`` (their order), ``data`` (studies of the benchmark), ``vision``, ``text`` and ``vlm``
(the answering model) with ``dialogue`` (what it is asked and told), ``clip`` (encoders),
``preference`` (pairs and adapters), ``check`` (measures and the model card), ``fusion`` (what
references could give at most).
"""
