"""What services, trainer and command line share: settings, records, the stream, the database, the weight store.

settings = load_settings(Path("run.toml"), ["--run.name", "web"])         # configuration.py, settings.py
run = open_run(settings)                                                  # runs.py: its records in the database
client = connect(settings.redis.url, timeout_s=10)                        # redis.py
stream = WindowStream(client, run.name)                                   # stream.py: scored windows to train
Coordination(client, run.name).trainer_report()                           # coordination.py: facts that expire
WeightStore(settings.weight_store_url).versions()                         # weights/: versions of the policy
"""
