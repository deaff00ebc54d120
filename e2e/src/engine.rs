//! A Docker engine: images of one static program each, and the containers that run them.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use testcontainers::bollard::Docker;
use testcontainers::bollard::query_parameters::{
    ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, RemoveImageOptions,
};
use testcontainers::core::client::docker_client_instance;
use testcontainers::runners::AsyncBuilder;
use testcontainers::{ContainerRequest, GenericBuildableImage, GenericImage, ImageExt};
use tokio::runtime::Handle;
use tokio::task::block_in_place;

/// Tells which containers a test has made.
const LABEL: &str = "io.servicekeel.e2e";

/// The user and group that containers run as, as in the manifests of `examples/simple`.
const USER: &str = "65532:65532";

const NO_ENGINE: &str = "no Docker engine answers: start one, or name its socket in DOCKER_HOST; \
                         `e2e/with-docker make test-images`, as root, starts one for the test";

/// An engine, and what a test makes there: all removed when dropped. Needs a runtime of several threads.
pub struct Engine {
    docker: Docker,
    /// Tells the tests apart that use the engine at the same time.
    run: String,
    images: Vec<String>,
}

impl Engine {
    /// The engine that answers at `DOCKER_HOST`, or where engines usually do.
    ///
    /// # Errors
    /// Where none answers.
    pub async fn connect() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let docker = docker_client_instance().await.context(NO_ENGINE)?;
        docker.ping().await.context(NO_ENGINE)?;
        let run = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst));
        Ok(Self { docker, run, images: Vec::new() })
    }

    /// A name that no other test has at this engine.
    pub fn name(&self, of: &str) -> String {
        format!("servicekeel-e2e-{of}-{}", self.run)
    }

    /// Builds an image that holds one file: a static program, which it runs.
    ///
    /// # Errors
    /// Where the program can't be read, or the engine refuses.
    pub async fn image(&mut self, program: &Path) -> Result<GenericImage> {
        let file = program.file_name().and_then(|name| name.to_str()).context("a program without a name")?;
        let (name, tag) = (format!("servicekeel-e2e/{file}"), self.run.as_str());
        let image = GenericBuildableImage::new(name.as_str(), tag)
            .with_dockerfile_string(format!("FROM scratch\nCOPY {file} /{file}\nENTRYPOINT [\"/{file}\"]\n"))
            .with_file(program, file)
            .build_image()
            .await
            .with_context(|| format!("an image of {}", program.display()))?;
        self.images.push(format!("{name}:{tag}"));
        Ok(image)
    }

    /// A container that may nothing but run: no root, no capability, no way to get either, nothing written but what is
    /// mounted.
    pub fn container(&self, image: &GenericImage) -> ContainerRequest<GenericImage> {
        image
            .clone()
            .with_label(LABEL, &self.run)
            .with_user(USER)
            .with_cap_drop("ALL")
            .with_security_opt("no-new-privileges")
            .with_readonly_rootfs(true)
    }

    /// Removes the images. A container that did not start is still there then, and would keep its image.
    async fn clear(&self) -> Result<()> {
        let ours = std::iter::once(("label", vec![format!("{LABEL}={}", self.run)])).collect();
        let options = ListContainersOptionsBuilder::new().all(true).filters(&ours).build();
        for container in self.docker.list_containers(Some(options)).await? {
            let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
            let id = container.id.context("a container without an id")?;
            self.docker.remove_container(&id, Some(options)).await?;
        }
        for image in &self.images {
            self.docker.remove_image(image, None::<RemoveImageOptions>, None).await?;
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Err(error) = block_in_place(|| Handle::current().block_on(self.clear())) {
            eprintln!("{LABEL}={} is not all removed: {error:#}", self.run);
        }
    }
}
