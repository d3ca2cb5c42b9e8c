"""Entry point for `ray job submit`: everything up to the fused model on the cluster that the job was submitted to.

ray job submit --address http://HEAD:8265 --working-dir . -- python ray_jobs/fuse.py --config configs/smoke.yaml
"""

from entry import start

if __name__ == "__main__":
    start("fuse", __doc__)
