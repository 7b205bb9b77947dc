"""The trainer: reads scored windows, makes preference pairs, updates the policy, publishes its weights.

    from trainer.assembly import train

    train(settings, stop=threading.Event())     # what `python -m trainer --config FILE` does

Read in this order:

    loop, lead                                            a step on one screen; what rank 0 does for it
    assembly, connections, lease                          how a trainer is put together; exactly one writes
    reader, inbox, preferences                            from the stream to the pairs of a step
    layouts, log_probs, losses                            from pairs to a loss
    policy, sharding, optimizer, ranks, heartbeats        the model on one process or many
    snapshot, sender, publication, publisher, replicas    weights to the rollouts
    checkpoint, moments, model_folder                     what a resume needs
    figures, throughput, profiler                         what people see of it
"""
