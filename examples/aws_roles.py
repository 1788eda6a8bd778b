"""What the nodes of cluster.yaml may do in AWS: two roles, each with an instance profile.

    python examples/aws_roles.py BUCKET

Ray gives a profile of its own making to the head alone, so workers could read and write no bucket.
Done with your own credentials, once for an account; the same command again changes nothing, or the
bucket. `compress-cluster-worker` reads and writes the bucket; `compress-cluster-head` also starts
and ends workers. Nothing here was run in an account by us; the test runs it against a server on
this machine.
"""

import json
import sys

import boto3

HEAD, WORKER = "compress-cluster-head", "compress-cluster-worker"
TRUST = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"},
         "Action": "sts:AssumeRole"}  # fmt: skip


def bucket_rights(bucket: str) -> list[dict[str, object]]:
    """Return what a run does with its bucket: read, write, list, and clear away."""
    arn = f"arn:aws:s3:::{bucket}"
    files = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        {"Effect": "Allow", "Action": files, "Resource": f"{arn}/*"},
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": arn},
    ]


def machine_rights(worker_role: str) -> list[dict[str, object]]:
    """Return what Ray's autoscaler does on the head."""
    machines = ["RunInstances", "TerminateInstances", "CreateTags", "DescribeInstances",
                "DescribeInstanceTypes", "DescribeImages"]  # fmt: skip
    return [
        {"Effect": "Allow", "Action": [f"ec2:{m}" for m in machines], "Resource": "*"},
        # A worker gets its role from the head, which must be allowed to hand out this one.
        {"Effect": "Allow", "Action": "iam:PassRole", "Resource": worker_role},
        # The image is named by a public parameter, which RunInstances reads as whoever calls it.
        {"Effect": "Allow", "Action": "ssm:GetParameters",
         "Resource": "arn:aws:ssm:*::parameter/aws/service/*"},
        # The first spot machine of an account makes this role.
        {"Effect": "Allow", "Action": "iam:CreateServiceLinkedRole", "Resource": "*",
         "Condition": {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}}},
    ]  # fmt: skip


def make_role(iam: object, name: str, rights: list[dict[str, object]]) -> str:
    """Make a role with its instance profile where they are not there; return the role's ARN."""
    trust = json.dumps({"Version": "2012-10-17", "Statement": [TRUST]})
    there = iam.exceptions.EntityAlreadyExistsException
    try:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    except there:
        print(f"{name} is there; its rights are set anew")
    policy = json.dumps({"Version": "2012-10-17", "Statement": rights})
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=policy)
    return iam.get_role(RoleName=name)["Role"]["Arn"]


def main(bucket: str) -> None:
    """Make both."""
    iam = boto3.client("iam", region_name="us-east-1")  # it has one place
    worker = make_role(iam, WORKER, bucket_rights(bucket))
    make_role(iam, HEAD, bucket_rights(bucket) + machine_rights(worker))
    print(f"{HEAD} and {WORKER} may use s3://{bucket}")


if __name__ == "__main__":
    _, *buckets = sys.argv
    if len(buckets) != 1:
        sys.exit("python examples/aws_roles.py BUCKET")
    main(buckets[0])
